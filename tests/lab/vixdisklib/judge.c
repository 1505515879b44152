/* An outside judge of the ABI, written against vixdisklib.h alone: what a program in C makes of it.
 *
 *   judge layout                                        sizes and offsets, a line each
 *   judge copy LIBRARY SERVER PORT USER THUMBPRINT VM SNAPSHOT PATH   the disk to stdout; VIXLAB_PASSWORD has the password
 *
 * "copy" looks up all 22 symbols that nbdkit's plugin wants, and reads as that does: asynchronously, then Wait. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vixdisklib.h"

#define DEPTH 8
#define REQUEST 2048 /* sectors */

static int layout(void) {
#define SIZE(type) printf("%s %zu\n", #type, sizeof(type))
#define OFFSET(type, field) printf("%s.%s %zu\n", #type, #field, offsetof(type, field))
  SIZE(VixDiskLibConnectParams);
  OFFSET(VixDiskLibConnectParams, vmxSpec);
  OFFSET(VixDiskLibConnectParams, serverName);
  OFFSET(VixDiskLibConnectParams, thumbPrint);
  OFFSET(VixDiskLibConnectParams, reserved1);
  OFFSET(VixDiskLibConnectParams, credType);
  OFFSET(VixDiskLibConnectParams, creds);
  OFFSET(VixDiskLibConnectParams, port);
  OFFSET(VixDiskLibConnectParams, nfcHostPort);
  OFFSET(VixDiskLibConnectParams, vStorageObjSpec);
  OFFSET(VixDiskLibConnectParams, specType);
  SIZE(VixDiskLibInfo);
  OFFSET(VixDiskLibInfo, capacity);
  OFFSET(VixDiskLibInfo, numLinks);
  OFFSET(VixDiskLibInfo, uuid);
  OFFSET(VixDiskLibInfo, logicalSectorSize);
  SIZE(VixDiskLibBlock);
  OFFSET(VixDiskLibBlockList, blocks);
  SIZE(VixError);
  return 0;
}

static void fail(const char *what, VixError error) {
  fprintf(stderr, "%s: %lu\n", what, (unsigned long)(error & 0xffff));
  exit(1);
}

static void silent(const char *format, va_list arguments) { (void)format, (void)arguments; }

static void done(void *data, VixError error) {
  (void)data;
  if (error) fail("ReadAsync", error);
}

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) fprintf(stderr, "no symbol %s\n", name), exit(1);
  return found;
}

#define SYMBOL(name) __typeof__(&name) p_##name = symbol(library, #name)

static int copy(char **arg) {
  void *library = dlopen(arg[0], RTLD_NOW);
  if (!library) fprintf(stderr, "%s\n", dlerror()), exit(1);
  SYMBOL(VixDiskLib_InitEx);
  SYMBOL(VixDiskLib_Exit);
  SYMBOL(VixDiskLib_AllocateConnectParams);
  SYMBOL(VixDiskLib_FreeConnectParams);
  SYMBOL(VixDiskLib_ConnectEx);
  SYMBOL(VixDiskLib_Open);
  SYMBOL(VixDiskLib_GetInfo);
  SYMBOL(VixDiskLib_FreeInfo);
  SYMBOL(VixDiskLib_ReadAsync);
  SYMBOL(VixDiskLib_Wait);
  SYMBOL(VixDiskLib_Close);
  SYMBOL(VixDiskLib_Disconnect);
  SYMBOL(VixDiskLib_Write);
  const char *others[] = {"GetErrorText", "FreeErrorText", "GetTransportMode",    "Read",         "Create",
                          "Flush",        "WriteAsync",    "QueryAllocatedBlocks", "FreeBlockList"};
  char name[64];
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    snprintf(name, sizeof name, "VixDiskLib_%s", others[i]), symbol(library, name);

  char spec[64], *password = getenv("VIXLAB_PASSWORD");
  snprintf(spec, sizeof spec, "moref=%s", arg[5]);
  VixDiskLibConnection connection;
  VixDiskLibHandle handle;
  VixDiskLibInfo *info;
  VixError error = p_VixDiskLib_InitEx(6, 5, silent, silent, silent, "/", NULL);
  if (error) fail("InitEx", error);
  VixDiskLibConnectParams *params = p_VixDiskLib_AllocateConnectParams();
  params->vmxSpec = spec, params->serverName = arg[1], params->port = atoi(arg[2]);
  params->credType = VIXDISKLIB_CRED_UID, params->thumbPrint = arg[4];
  params->creds.uid.userName = arg[3], params->creds.uid.password = password;
  if ((error = p_VixDiskLib_ConnectEx(params, 1, *arg[6] ? arg[6] : NULL, "nbdssl:nbd", &connection)))
    fail("ConnectEx", error);
  if ((error = p_VixDiskLib_Open(connection, arg[7], VIXDISKLIB_FLAG_OPEN_READ_ONLY, &handle))) fail("Open", error);
  if ((error = p_VixDiskLib_GetInfo(handle, &info))) fail("GetInfo", error);
  uint64_t sectors = info->capacity;
  p_VixDiskLib_FreeInfo(info);

  static uint8_t buffer[DEPTH * REQUEST * VIXDISKLIB_SECTOR_SIZE];
  for (uint64_t at = 0, part; at < sectors; at += part) {
    part = sectors - at < DEPTH * REQUEST ? sectors - at : DEPTH * REQUEST;
    for (uint64_t i = 0; i < part; i += REQUEST) {
      uint64_t count = part - i < REQUEST ? part - i : REQUEST;
      uint8_t *into = buffer + i * VIXDISKLIB_SECTOR_SIZE;
      if ((error = p_VixDiskLib_ReadAsync(handle, at + i, count, into, done, NULL)) != VIX_ASYNC)
        fail("ReadAsync", error);
    }
    if ((error = p_VixDiskLib_Wait(handle))) fail("Wait", error);
    fwrite(buffer, VIXDISKLIB_SECTOR_SIZE, part, stdout);
  }
  if (p_VixDiskLib_Write(handle, 0, 1, buffer) == VIX_OK) fail("Write was not refused", 0);
  p_VixDiskLib_Close(handle);
  p_VixDiskLib_Disconnect(connection);
  p_VixDiskLib_FreeConnectParams(params);
  p_VixDiskLib_Exit();
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && !strcmp(argv[1], "layout")) return layout();
  if (argc == 10 && !strcmp(argv[1], "copy")) return copy(argv + 2);
  fprintf(stderr, "judge layout | judge copy LIBRARY SERVER PORT USER THUMBPRINT VM SNAPSHOT PATH\n");
  return 2;
}
