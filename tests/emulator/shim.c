// Host-side stand-in for the CUDA runtime entry points that a CuTeDSL object file (compiled with --enable-tvm-ffi and
// written by export_to_c) leaves undefined. Nothing is launched: the launch configuration and the raw kernel arguments
// go to a callback that the emulator registers.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint32_t x, y, z; } dim3_t;
typedef struct { int32_t id; int32_t pad; union { uint32_t u32[16]; int32_t i32[16]; char raw[64]; } val; } attr_t;
typedef struct { dim3_t grid, block; size_t smem; void *stream; attr_t *attrs; uint32_t num_attrs; } config_t;
typedef struct { char name[2048]; } kernel_t;
typedef int (*launch_cb_t)(const char *name, const uint32_t *grid, const uint32_t *block, const uint32_t *cluster,
                           uint64_t smem, void **args);

enum { ATTR_SM_COUNT = 16, ATTR_SMEM_OPTIN = 97, LAUNCH_CLUSTER = 4 };

static launch_cb_t g_launch;
static char g_error[4096];
static int g_smem_optin = 232448;
static int g_sm_count = 132;

void emulator_set_launch(launch_cb_t cb) { g_launch = cb; }
void emulator_set_device(int smem_optin, int sm_count) { g_smem_optin = smem_optin; g_sm_count = sm_count; }
const char *emulator_error(void) { return g_error; }
void emulator_clear_error(void) { g_error[0] = 0; }

int _cudaLibraryLoadData(void **lib, const void *code) { *lib = (void *)code; return 0; }
int _cudaLibraryGetKernel(void **kernel, void *lib, const char *name) {
  kernel_t *k = calloc(1, sizeof *k);
  strncpy(k->name, name, sizeof k->name - 1);
  *kernel = k;
  return 0;
}
int _cudaKernelSetAttributeForDevice(void *k, int attr, int value, int dev) { return 0; }
int _cudaFuncSetAttribute(void *k, int attr, int value) { return 0; }
int _cuKernelGetAttribute(int *out, int attr, void *k, int dev) { *out = 0; return 0; }
int _cudaGetDevice(int *dev) { *dev = 0; return 0; }
int _cudaSetDevice(int dev) { return 0; }
int _cudaDeviceGetAttribute(int *out, int attr, int dev) {
  *out = attr == ATTR_SMEM_OPTIN ? g_smem_optin : attr == ATTR_SM_COUNT ? g_sm_count : 0;
  return 0;
}
int _cudaLaunchKernelEx(const config_t *cfg, void *kernel, void **args) {
  uint32_t cluster[3] = {1, 1, 1};
  for (uint32_t i = 0; i < cfg->num_attrs; i++)
    if (cfg->attrs[i].id == LAUNCH_CLUSTER) memcpy(cluster, cfg->attrs[i].val.u32, sizeof cluster);
  if (!g_launch) return 1;
  return g_launch(((kernel_t *)kernel)->name, &cfg->grid.x, &cfg->block.x, cluster, cfg->smem, args);
}

int cuda_dialect_init_library_once(void **lib, int (*init)(void **), int (*load)(void **, int), void *raise) {
  if (*lib) return 0;
  int rc = init(lib);
  return rc ? rc : load(lib, 0);
}
void cuda_dialect_unload_library_once(void *lib) {}
void CuteDSLRT_TVMFFISetRaisedCudaError(int code) { snprintf(g_error, sizeof g_error, "cuda error %d", code); }

// The TVM-FFI symbols, so that libtvm_ffi is not needed either.
void *TVMFFIEnvGetStream(int32_t device_type, int32_t device_id) { return 0; }
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *msg) { snprintf(g_error, sizeof g_error, "%s: %s", kind, msg); }
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t n) {
  int at = snprintf(g_error, sizeof g_error, "%s: ", kind);
  for (int i = 0; i < n && at < (int)sizeof g_error; i++)
    if (parts[i]) at += snprintf(g_error + at, sizeof g_error - at, "%s", parts[i]);
}
