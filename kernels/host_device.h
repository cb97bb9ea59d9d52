// VATTN_HD marks a function that is compiled for the host and, by nvcc, for the device too.
#ifndef VATTN_KERNELS_HOST_DEVICE_H_
#define VATTN_KERNELS_HOST_DEVICE_H_

#ifdef __CUDACC__
#define VATTN_HD __host__ __device__
#else
#define VATTN_HD
#endif

#endif  // VATTN_KERNELS_HOST_DEVICE_H_
