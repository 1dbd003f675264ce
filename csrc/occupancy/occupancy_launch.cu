// The kernels of the occupancy grid and their launches, free of torch: the extension and `make cuda-check`
// compile the same.
#include "occupancy_kernels.cuh"

namespace mipnerf {

template void launch_occupancy_visits<float, 2>(const DeviceModel<float>&, const VisitArguments&, Stream);
template void launch_occupancy_visits<float, 4>(const DeviceModel<float>&, const VisitArguments&, Stream);
template void launch_occupancy_visits<Half, 2>(const DeviceModel<Half>&, const VisitArguments&, Stream);
template void launch_occupancy_visits<Half, 4>(const DeviceModel<Half>&, const VisitArguments&, Stream);

}  // namespace mipnerf
