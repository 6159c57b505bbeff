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
typedef struct { char name[2048]; int dynamic_smem, non_portable; } kernel_t;
typedef int (*launch_cb_t)(const char *name, const uint32_t *grid, const uint32_t *block, const uint32_t *cluster,
                           uint64_t smem, int programmatic, int non_portable, void **args);

enum { ATTR_SM_COUNT = 16, ATTR_SMEM_OPTIN = 97, LAUNCH_CLUSTER = 4, LAUNCH_PROGRAMMATIC = 6,
       MAX_DYNAMIC_SMEM = 8, NON_PORTABLE_CLUSTER = 14, SMEM_WITHOUT_OPTIN = 48 << 10 };

static launch_cb_t g_launch;
static char g_error[4096];
static int g_smem_optin = 232448;
static int g_sm_count = 132;

void emulator_set_launch(launch_cb_t cb) { g_launch = cb; }
void emulator_set_device(int smem_optin, int sm_count) { g_smem_optin = smem_optin; g_sm_count = sm_count; }
const char *emulator_error(void) { return g_error; }
void emulator_clear_error(void) { g_error[0] = 0; }

static void note_cuda_error(int code) {  // keeps the first message, which says more
  if (code && !g_error[0]) snprintf(g_error, sizeof g_error, "cuda error %d", code);
}

int _cudaLibraryLoadData(void **lib, const void *code) { *lib = (void *)code; return 0; }
int _cudaLibraryGetKernel(void **kernel, void *lib, const char *name) {
  kernel_t *k = calloc(1, sizeof *k);
  strncpy(k->name, name, sizeof k->name - 1);
  *kernel = k;
  return 0;
}
int _cudaFuncSetAttribute(void *k, int attr, int value) {
  if (attr == MAX_DYNAMIC_SMEM) ((kernel_t *)k)->dynamic_smem = value;
  if (attr == NON_PORTABLE_CLUSTER) ((kernel_t *)k)->non_portable = value;
  return 0;
}
int _cudaKernelSetAttributeForDevice(void *k, int attr, int value, int dev) {
  return _cudaFuncSetAttribute(k, attr, value);
}
int _cuKernelGetAttribute(int *out, int attr, void *k, int dev) { *out = 0; return 0; }
int _cudaGetDevice(int *dev) { *dev = 0; return 0; }
int _cudaSetDevice(int dev) { return 0; }
int _cudaDeviceGetAttribute(int *out, int attr, int dev) {
  *out = attr == ATTR_SMEM_OPTIN ? g_smem_optin : attr == ATTR_SM_COUNT ? g_sm_count : 0;
  return 0;
}
int _cudaLaunchKernelEx(const config_t *cfg, void *kernel, void **args) {
  uint32_t cluster[3] = {1, 1, 1};
  int programmatic = 0;
  for (uint32_t i = 0; i < cfg->num_attrs; i++) {
    if (cfg->attrs[i].id == LAUNCH_CLUSTER) memcpy(cluster, cfg->attrs[i].val.u32, sizeof cluster);
    if (cfg->attrs[i].id == LAUNCH_PROGRAMMATIC) programmatic = cfg->attrs[i].val.i32[0];
  }
  kernel_t *k = kernel;
  if (cfg->smem > SMEM_WITHOUT_OPTIN && cfg->smem > (uint64_t)k->dynamic_smem && !g_error[0])
    snprintf(g_error, sizeof g_error, "launch with %zu bytes of dynamic shared memory: the attribute allows %d",
             cfg->smem, k->dynamic_smem > SMEM_WITHOUT_OPTIN ? k->dynamic_smem : SMEM_WITHOUT_OPTIN);
  if (!g_launch || g_error[0]) return 1;  // an earlier call failed where the caller does not look at its result
  return g_launch(k->name, &cfg->grid.x, &cfg->block.x, cluster, cfg->smem, programmatic,
                  k->non_portable, args);
}

// The documented checks of cuTensorMapEncodeTiled and the format that tensormap.py decodes.
// Types 13 to 15 are packed: 16 elements of 4 bits in 8 bytes, or of 4 or 6 bits in 16 bytes of shared memory.
// Swizzles 4 to 6 are the 128-byte one with atoms of 32 bytes, of 32 bytes with halves of 8 flipped, of 64 bytes.
enum { TYPES = 16, SWIZZLES = 7, PACKED4 = 13, PADDED4 = 14, PADDED6 = 15, INVALID_VALUE = 1 };
static const uint8_t element_code[TYPES] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 7, 8, 11, 12, 13};
static const uint8_t element_bits[TYPES] = {8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 8, 8};  // in shared memory
static const uint32_t span_bytes[SWIZZLES] = {0, 32, 64, 128, 128, 128, 128};
static const uint8_t span_code[SWIZZLES] = {0, 1, 2, 3, 3, 3, 3}, atom_code[SWIZZLES] = {0, 0, 0, 0, 1, 2, 3};

static int refuse(const char *why) {
  snprintf(g_error, sizeof g_error, "cuTensorMapEncodeTiled: %s", why);
  return INVALID_VALUE;
}

int _cuTensorMapEncodeTiled(uint64_t *map, uint32_t dtype, uint32_t rank, void *address, const uint64_t *dims,
                            const uint64_t *strides, const uint32_t *box, const uint32_t *steps, uint32_t interleave,
                            uint32_t swizzle, uint32_t promotion, uint32_t oob_nan) {
  uint64_t q[8] = {0}, base = (uint64_t)address;
  if ((uintptr_t)map % 64) return refuse("the tensor map is not 64-byte aligned");
  if (dtype >= TYPES) return refuse("unknown data type");
  if (rank < 1 || rank > 5) return refuse("rank is not 1 to 5");
  if (interleave > 2 || swizzle >= SWIZZLES || promotion > 3 || oob_nan > 1)
    return refuse("an enumeration is out of range");
  int padded = dtype == PADDED4 || dtype == PADDED6;
  uint32_t unit = interleave == 2 || padded ? 32 : 16;
  if (base % unit) return refuse(unit == 32 ? "the address is not 32-byte aligned" : "the address is not 16-byte aligned");
  if (base >> 57) return refuse("the address has more than 57 bits");
  uint32_t row = box[0] * element_bits[dtype] / 8;
  if (!interleave && row % 16) return refuse("a box row is not a multiple of 16 bytes");
  if (!interleave && swizzle && row > span_bytes[swizzle]) return refuse("a box row is longer than the swizzle span");
  if (oob_nan && (dtype < 6 || dtype >= PACKED4)) return refuse("NaN fill of a type that is not floating-point");
  if (dtype >= PACKED4 && interleave) return refuse("interleaving of a packed type");
  if (dtype == PACKED4 && dims[0] % 2) return refuse("dimension 0 of a packed type is odd");
  if (padded && (dims[0] % 128 || box[0] != 128))
    return refuse("dimension 0 of a padded type is no multiple of 128, or its box side is not 128");
  if (padded && (swizzle == 1 || swizzle == 2 || swizzle == 5)) return refuse("a padded type with that swizzle");
  int tf32 = dtype == 11 || dtype == 12;
  uint32_t flags = (rank - 1) << 4 | element_code[dtype] << 7 | interleave << 11 | span_code[swizzle] << 13 |
                   oob_nan << 15 | tf32 << 16 | promotion << 17 | atom_code[swizzle] << 19;
  uint32_t *w = (uint32_t *)q;
  q[0] = base;
  w[2] = flags;
  for (uint32_t i = 0; i < rank; i++) {
    if (dims[i] < 1 || dims[i] > 1ull << 32) return refuse("a dimension is not 1 to 2**32");
    if (box[i] < 1 || box[i] > 256) return refuse("a box dimension is not 1 to 256");
    if (steps[i] < 1 || steps[i] > 8) return refuse("a traversal stride is not 1 to 8");
    w[8 + i] = (uint32_t)(dims[i] - 1);
    w[13] |= (steps[i] - 1) << (3 * i);
    ((uint8_t *)q)[55 + i] = (uint8_t)(box[i] - 1);
  }
  for (uint32_t i = 0; i + 1 < rank; i++) {
    if (strides[i] % unit) return refuse(unit == 32 ? "a stride is not a multiple of 32 bytes" : "a stride is not a multiple of 16 bytes");
    if (strides[i] >> 40) return refuse("a stride is 2**40 bytes or more");
    w[3 + i] = (uint32_t)(strides[i] >> 4);
    w[7] |= (uint32_t)(strides[i] >> 36 & 15) << (4 * i);
  }
  memset(map, 0, 128);
  memcpy(map, q, sizeof q);
  return 0;
}
void cuda_dialect_assert_success(int code) { note_cuda_error(code); }

int cuda_dialect_init_library_once(void **lib, int (*init)(void **), int (*load)(void **, int), void *raise) {
  if (*lib) return 0;
  int rc = init(lib);
  return rc ? rc : load(lib, 0);
}
void cuda_dialect_unload_library_once(void *lib) {}
void CuteDSLRT_TVMFFISetRaisedCudaError(int code) { note_cuda_error(code); }

// The TVM-FFI symbols, so that libtvm_ffi is not needed either.
void *TVMFFIEnvGetStream(int32_t device_type, int32_t device_id) { return 0; }
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *msg) { snprintf(g_error, sizeof g_error, "%s: %s", kind, msg); }
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t n) {
  int at = snprintf(g_error, sizeof g_error, "%s: ", kind);
  for (int i = 0; i < n && at < (int)sizeof g_error; i++)
    if (parts[i]) at += snprintf(g_error + at, sizeof g_error - at, "%s", parts[i]);
}
