// Reading and writing the array files of program.h. A file is a sequence of records: "A" (an array) or "O"
// (an output) or "." (the end); name, type (each: 32-bit length, bytes); 32-bit number of dimensions, 64-bit
// sizes; 32-bit misalignment in bytes; 32-bit flag whether values follow; the values. All little-endian.
#include "program.h"

#include <cstdio>
#include <cstdlib>

namespace mipnerf::emulation {

namespace {

class File {
  public:
    File(const std::string& path, const char* mode) : path_(path), file_(fopen(path.c_str(), mode)) {
        if (!file_) fail("cannot open %s", path.c_str());
    }
    ~File() { fclose(file_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    void read(void* to, std::size_t bytes) {
        if (bytes && fread(to, 1, bytes, file_) != bytes)
            fail("%s ends in the middle of a record", path_.c_str());
    }
    void write(const void* from, std::size_t bytes) {
        if (bytes && fwrite(from, 1, bytes, file_) != bytes) fail("cannot write %s", path_.c_str());
    }
    template <typename T>
    T read_number() {
        T value;
        read(&value, sizeof value);
        return value;
    }
    std::string read_text() {
        std::string text(read_number<std::uint32_t>(), '\0');
        read(&text[0], text.size());
        return text;
    }
    template <typename T>
    void write_number(T value) {
        write(&value, sizeof value);
    }
    void write_text(const std::string& text) {
        write_number(static_cast<std::uint32_t>(text.size()));
        write(text.data(), text.size());
    }

  private:
    std::string path_;
    FILE* file_;
};

}  // namespace

Program::Program(int argc, char** argv) {
    if (argc < 4) fail("usage: %s INPUT_FILE OUTPUT_FILE SEED [name=value ...]", argv[0]);
    output_path_ = argv[2];
    set_seed(strtoull(argv[3], nullptr, 10));
    for (int i = 4; i < argc; ++i) {
        const std::string argument = argv[i];
        const std::size_t equals = argument.find('=');
        if (equals == std::string::npos) fail("argument %s is not of the form name=value", argv[i]);
        scalars_[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
    File file(argv[1], "rb");
    for (;;) {
        const char kind = file.read_number<char>();
        if (kind == '.') break;
        const std::string name = file.read_text();
        ArrayRecord record;
        record.is_output = kind == 'O';
        record.type = file.read_text();
        record.shape.resize(file.read_number<std::uint32_t>());
        record.bytes = static_cast<std::size_t>(record.type.back() - '0');
        for (std::int64_t& size : record.shape) {
            size = file.read_number<std::int64_t>();
            record.bytes *= static_cast<std::size_t>(size);
        }
        const auto misalignment = file.read_number<std::uint32_t>();
        const auto has_values = file.read_number<std::uint32_t>();
        record.data = allocate(name.c_str(), record.bytes, misalignment);
        if (has_values) file.read(record.data, record.bytes);
        if (!record.is_output) make_read_only(record.data);
        arrays_.emplace(name, record);
    }
}

Program::~Program() {
    File file(output_path_, "wb");
    for (const auto& [name, record] : arrays_) {
        if (!record.is_output) continue;
        file.write("O", 1);
        file.write_text(name);
        file.write_text(record.type);
        file.write_number(static_cast<std::uint32_t>(record.shape.size()));
        for (const std::int64_t size : record.shape) file.write_number(size);
        file.write_number(std::uint32_t{0});
        file.write_number(std::uint32_t{1});
        file.write(record.data, record.bytes);
    }
    file.write(".", 1);
}

std::int64_t Program::size(const std::string& name, std::size_t dimension) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) fail("no array '%s' was given", name.c_str());
    if (dimension >= found->second.shape.size())
        fail("array '%s' has %zu dimensions, number %zu was asked for", name.c_str(),
             found->second.shape.size(), dimension);
    return found->second.shape[dimension];
}

std::string Program::type(const std::string& name) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) fail("no array '%s' was given", name.c_str());
    return found->second.type;
}

void* Program::find(const std::string& name, const char* type, bool is_output) const {
    const ArrayRecord& record = arrays_.at(name);
    if (record.type != type)
        fail("array '%s' is %s, the program wants %s", name.c_str(), record.type.c_str(), type);
    if (record.is_output != is_output)
        fail("array '%s' was given as an %s", name.c_str(), record.is_output ? "output" : "input");
    return record.data;
}

std::string Program::text(const std::string& name) const {
    const auto found = scalars_.find(name);
    if (found == scalars_.end()) fail("no scalar '%s' was given", name.c_str());
    return found->second;
}

std::int64_t Program::integer(const std::string& name) const {
    const std::string value = text(name);
    char* end = nullptr;
    const long long number = strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end)
        fail("scalar '%s' is '%s', the program wants an integer", name.c_str(), value.c_str());
    return number;
}

double Program::number(const std::string& name) const {
    const std::string value = text(name);
    char* end = nullptr;
    const double number = strtod(value.c_str(), &end);
    if (value.empty() || *end)
        fail("scalar '%s' is '%s', the program wants a number", name.c_str(), value.c_str());
    return number;
}

}  // namespace mipnerf::emulation
