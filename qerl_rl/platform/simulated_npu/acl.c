// CANN's runtime library for a machine without a card: device memory is host memory, and everything happens at once.
// It proves nothing about kernels, memory formats, streams that overlap, or speed.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES 16
#define CAPACITY ((size_t)64 << 30)
#define ALIGNMENT 512
enum { SUCCESS = 0, OUT_OF_MEMORY = 207001, NOT_SUPPORTED = 500002 };

typedef struct {
    size_t bytes;
    int device;
} Block;

static __thread int current = 0;
static size_t used[DEVICES];

// ---- devices and contexts
int aclrtGetDeviceCount(uint32_t *count) { *count = DEVICES; return SUCCESS; }
int aclrtSetDevice(int32_t device) { current = device; return SUCCESS; }
int aclrtGetDevice(int32_t *device) { *device = current; return SUCCESS; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = 1;
    return SUCCESS;
}
// A context is the number of its device, plus one so that it is no null pointer.
int aclrtGetCurrentContext(void **context) { *context = (void *)(intptr_t)(current + 1); return SUCCESS; }
int aclrtSetCurrentContext(void *context) { current = (int)(intptr_t)context - 1; return SUCCESS; }
int aclrtCreateContext(void **context, int32_t device) { *context = (void *)(intptr_t)(device + 1); return SUCCESS; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 1; return SUCCESS; }
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical) { *logical = user; return SUCCESS; }
int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) { *value = 24; return SUCCESS; }
int aclrtGetDeviceResLimit(int32_t device, int type, uint32_t *value) { *value = 24; return SUCCESS; }
int aclrtGetStreamResLimit(void *stream, int type, uint32_t *value) { *value = 24; return SUCCESS; }
int aclrtGetResInCurrentThread(int type, uint32_t *value) { *value = 24; return SUCCESS; }
int aclGetDeviceCapability(uint32_t device, int type, int64_t *value) { *value = 1; return SUCCESS; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }

// ---- memory: the block's size and device lie before what the caller gets
static int allocate(void **memory, size_t bytes) {
    char *start;
    if (posix_memalign((void **)&start, ALIGNMENT, bytes + ALIGNMENT)) return OUT_OF_MEMORY;
    *(Block *)start = (Block){bytes, current};
    used[current] += bytes;
    *memory = start + ALIGNMENT;
    return SUCCESS;
}
int aclrtMalloc(void **memory, size_t bytes, int policy) { return allocate(memory, bytes); }
int aclrtMallocAlign32(void **memory, size_t bytes, int policy) { return allocate(memory, bytes); }
int aclrtMallocCached(void **memory, size_t bytes, int policy) { return allocate(memory, bytes); }
int aclrtMallocWithCfg(void **memory, size_t bytes, int policy, void *config) { return allocate(memory, bytes); }
int aclrtFree(void *memory) {
    if (!memory) return SUCCESS;
    Block *block = (Block *)((char *)memory - ALIGNMENT);
    used[block->device] -= block->bytes;
    free(block);
    return SUCCESS;
}
int aclrtMallocHost(void **memory, size_t bytes) {
    return posix_memalign(memory, ALIGNMENT, bytes ? bytes : 1) ? OUT_OF_MEMORY : SUCCESS;
}
int aclrtMallocHostWithCfg(void **memory, uint64_t bytes, void *config) { return aclrtMallocHost(memory, bytes); }
int aclrtFreeHost(void *memory) { free(memory); return SUCCESS; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) {
    *total = CAPACITY;
    *unused = CAPACITY - used[current];
    return SUCCESS;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    memmove(to, from, bytes);
    return SUCCESS;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, bytes, kind);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, bytes, kind);
}
int aclrtMemset(void *memory, size_t room, int32_t value, size_t bytes) {
    memset(memory, value, bytes);
    return SUCCESS;
}
int aclrtMemsetAsync(void *memory, size_t room, int32_t value, size_t bytes, void *stream) {
    return aclrtMemset(memory, room, value, bytes);
}

// ---- streams and events: names of nothing, always finished
static int name(void **handle) {
    static intptr_t last = 0x1000;
    *handle = (void *)__atomic_add_fetch(&last, 8, __ATOMIC_RELAXED);
    return SUCCESS;
}
int aclrtCreateStream(void **stream) { return name(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return name(stream); }
int aclrtCreateEvent(void **event) { return name(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return name(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return name(event); }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return SUCCESS; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return SUCCESS; }
int aclrtQueryEvent(void *event, int *status) { *status = 0; return SUCCESS; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0.01f; return SUCCESS; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return SUCCESS; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = (int32_t)(intptr_t)stream; return SUCCESS; }
int aclrtLaunchCallback(void (*call)(void *), void *data, int blocking, void *stream) { call(data); return SUCCESS; }
int aclrtLaunchHostFunc(void *stream, void (*call)(void *), void *data) { call(data); return SUCCESS; }

// ---- what torch_npu asks for when it starts
const char *aclGetRecentErrMsg(void) { return ""; }
void *aclCreateDataBuffer(void *data, size_t bytes) { return malloc(8); }
int aclDestroyDataBuffer(void *buffer) { free(buffer); return SUCCESS; }
void *aclCreateTensorDesc(int type, int dimensions, const int64_t *sizes, int format) { return malloc(8); }
void aclDestroyTensorDesc(void *description) { free(description); }
void *aclopCreateAttr(void) { return malloc(8); }
void aclopDestroyAttr(void *attributes) { free(attributes); }
size_t aclGetCompileoptSize(int option) { return 8; }
int aclGetCompileopt(int option, char *value, size_t room) { memset(value, 0, room); return SUCCESS; }
int aclsysGetCANNVersion(int package, void *version) { memset(version, 0, 16); return SUCCESS; }
int aclsysGetVersionStr(const char *package, char *version) { strcpy(version, "8.3.RC1"); return SUCCESS; }
int aclsysGetVersionNum(const char *package, int32_t *version) { *version = 80300000; return SUCCESS; }

// ---- kernels: there are none, and a launch must not look like one that worked
int aclopCompileAndExecute(void) { return NOT_SUPPORTED; }
int aclopCompileAndExecuteV2(void) { return NOT_SUPPORTED; }
int aclopExecuteV2(void) { return NOT_SUPPORTED; }
int aclopUpdateParams(void) { return NOT_SUPPORTED; }
int aclGenGraphAndDumpForOp(void) { return NOT_SUPPORTED; }
