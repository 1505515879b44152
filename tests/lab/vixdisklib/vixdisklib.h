/* The public API of VMware's VixDiskLib, as far as we play it: names, layouts and numbers as its Programming Guide and
 * nbdkit's vddk plugin have them; the words are ours. Offsets and lengths are sectors of 512 bytes. */
#ifndef VIXDISKLIB_H
#define VIXDISKLIB_H

#include <stdarg.h>
#include <stdint.h>

typedef uint64_t VixError; /* the code is in the low 16 bits */

enum {
  VIX_OK = 0,
  VIX_E_FAIL = 1,
  VIX_E_OUT_OF_MEMORY = 2,
  VIX_E_INVALID_ARG = 3,
  VIX_E_NOT_SUPPORTED = 6,
  VIX_E_FILE_READ_ONLY = 11,
  VIX_E_HOST_SERVER_NOT_FOUND = 14008,
  VIX_E_HOST_NETWORK_CONN_REFUSED = 14009,
  VIX_E_HOST_TCP_CONN_LOST = 14011,
  VIX_E_DISK_OUTOFRANGE = 16007,
  VIX_ASYNC = 25000
};

enum {
  VIXDISKLIB_FLAG_OPEN_UNBUFFERED = 1,
  VIXDISKLIB_FLAG_OPEN_SINGLE_LINK = 2,
  VIXDISKLIB_FLAG_OPEN_READ_ONLY = 4,
  VIXDISKLIB_FLAG_OPEN_COMPRESSION_ZLIB = 16,
  VIXDISKLIB_FLAG_OPEN_COMPRESSION_FASTLZ = 32,
  VIXDISKLIB_FLAG_OPEN_COMPRESSION_SKIPZ = 64
};

enum { VIXDISKLIB_SECTOR_SIZE = 512, VIXDISKLIB_MIN_CHUNK_SIZE = 128, VIXDISKLIB_MAX_CHUNK_NUMBER = 512 * 1024 };

typedef struct VixDiskLibConnectionStruct *VixDiskLibConnection;
typedef struct VixDiskLibHandleStruct *VixDiskLibHandle;
typedef void VixDiskLibGenericLogFunc(const char *format, va_list arguments);
typedef void (*VixDiskLibCompletionCB)(void *data, VixError result);

typedef enum { VIXDISKLIB_CRED_UID = 1, VIXDISKLIB_CRED_SESSIONID = 2 } VixDiskLibCredType;
typedef enum { VIXDISKLIB_SPEC_VMX = 0, VIXDISKLIB_SPEC_VSTORAGE_OBJECT = 1 } VixDiskLibSpecType;

typedef struct {
  char *vmxSpec; /* "moref=vm-12" */
  char *serverName;
  char *thumbPrint; /* SHA-1, AA:BB:… */
  long reserved1;
  VixDiskLibCredType credType;
  union {
    struct {
      char *userName, *password;
    } uid;
    struct {
      char *cookie, *userName, *key;
    } sessionId;
  } creds;
  uint32_t port, nfcHostPort;
  char *reserved2;
  char reserved3[8];
  void *reserved4;
  struct {
    char *id, *datastoreMoRef, *ssId;
  } vStorageObjSpec;
  VixDiskLibSpecType specType;
} VixDiskLibConnectParams;

typedef struct {
  uint32_t cylinders, heads, sectors;
} VixDiskLibGeometry;

typedef struct {
  VixDiskLibGeometry biosGeo, physGeo;
  uint64_t capacity;
  int adapterType, numLinks;
  char *parentFileNameHint, *uuid;
  uint32_t logicalSectorSize, physicalSectorSize; /* from 7.0 on */
} VixDiskLibInfo;

typedef struct {
  uint64_t offset, length;
} VixDiskLibBlock;

typedef struct {
  uint32_t numBlocks;
  VixDiskLibBlock blocks[1];
} VixDiskLibBlockList;

#pragma GCC visibility push(default)

/* What nbdkit's plugin asks a library for: 22 symbols. */
VixError VixDiskLib_InitEx(uint32_t major, uint32_t minor, VixDiskLibGenericLogFunc *log,
                           VixDiskLibGenericLogFunc *warn, VixDiskLibGenericLogFunc *panic, const char *library_dir,
                           const char *config_file);
void VixDiskLib_Exit(void);
char *VixDiskLib_GetErrorText(VixError error, const char *locale);
void VixDiskLib_FreeErrorText(char *text);
VixDiskLibConnectParams *VixDiskLib_AllocateConnectParams(void);
void VixDiskLib_FreeConnectParams(VixDiskLibConnectParams *params);
VixError VixDiskLib_ConnectEx(const VixDiskLibConnectParams *params, char read_only, const char *snapshot,
                              const char *transport_modes, VixDiskLibConnection *connection);
VixError VixDiskLib_Disconnect(VixDiskLibConnection connection);
VixError VixDiskLib_Open(VixDiskLibConnection connection, const char *path, uint32_t flags, VixDiskLibHandle *handle);
VixError VixDiskLib_Close(VixDiskLibHandle handle);
const char *VixDiskLib_GetTransportMode(VixDiskLibHandle handle);
VixError VixDiskLib_GetInfo(VixDiskLibHandle handle, VixDiskLibInfo **info);
void VixDiskLib_FreeInfo(VixDiskLibInfo *info);
VixError VixDiskLib_Read(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint8_t *buffer);
VixError VixDiskLib_ReadAsync(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint8_t *buffer,
                              VixDiskLibCompletionCB callback, void *data);
VixError VixDiskLib_Wait(VixDiskLibHandle handle);
VixError VixDiskLib_Write(VixDiskLibHandle handle, uint64_t start, uint64_t count, const uint8_t *buffer);
VixError VixDiskLib_WriteAsync(VixDiskLibHandle handle, uint64_t start, uint64_t count, const uint8_t *buffer,
                               VixDiskLibCompletionCB callback, void *data);
VixError VixDiskLib_Flush(VixDiskLibHandle handle);
VixError VixDiskLib_Create(VixDiskLibConnection connection, const char *path, const void *create_params,
                           void *progress, void *progress_data);
VixError VixDiskLib_QueryAllocatedBlocks(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint64_t chunk,
                                         VixDiskLibBlockList **list);
VixError VixDiskLib_FreeBlockList(VixDiskLibBlockList *list);

/* And three more of VMware's. */
VixError VixDiskLib_PrepareForAccess(const VixDiskLibConnectParams *params, const char *identity);
VixError VixDiskLib_EndAccess(const VixDiskLibConnectParams *params, const char *identity);
VixError VixDiskLib_Cleanup(const VixDiskLibConnectParams *params, uint32_t *cleaned_up, uint32_t *remaining);

#pragma GCC visibility pop

#endif
