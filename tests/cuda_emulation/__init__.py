"""The CUDA kernels, compiled by g++ and run on the CPU under sanitizers; see cuda_emulation.h."""
