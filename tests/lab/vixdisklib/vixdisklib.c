/* A stand-in for VMware's libvixDiskLib.so.8, for tests: it serves the disks of the lab that its connect parameters name.
 *
 * It keeps its caller to the rules of VMware's Programming Guide ("Multithreading Considerations"), and aborts where one
 * is broken. Environment variables make it misbehave; "n" counts the reads of the process from 1:
 *
 *   VIXLAB_LATENCY_MS=2      every read takes that much longer
 *   VIXLAB_FAIL_READ=n:code[:count]   reads n, n+1, … (1 of them) fail with that VIX error code
 *   VIXLAB_CRASH_READ=n      the process dies of SIGSEGV at read n
 *   VIXLAB_STALL_READ=n      read n never ends
 *   VIXLAB_FAIL_OPEN=code[:count]     so do the first Opens
 *   VIXLAB_STALL_OPEN=1      Open never returns
 *   VIXLAB_FAIL_BLOCKS=code  QueryAllocatedBlocks fails
 *   VIXLAB_SHORT_BLOCKS=1    it lists every chunk for itself
 *   VIXLAB_ZERO_READS=1      reads give zeros, as a library does that is too old for its server
 *   VIXLAB_NO_ASYNC=1        ReadAsync is not supported
 *   VIXLAB_FILE=path         reads come from that file, past the lab, and all of it is allocated: for benchmarks
 */
#define _GNU_SOURCE
#include "vixdisklib.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "link.h"

#define THREADS 8 /* of a disk: how many asynchronous reads are under way at once */
#define SECTOR ((uint64_t)VIXDISKLIB_SECTOR_SIZE)

struct VixDiskLibConnectionStruct {
  struct server server;
  char *vm, *snapshot, *modes;
  char read_only;
};

struct read {
  uint64_t start, count;
  uint8_t *buffer;
  VixDiskLibCompletionCB callback;
  void *data;
  struct read *next;
};

struct VixDiskLibHandleStruct {
  VixDiskLibConnection connection;
  struct link *link; /* of the caller's own thread */
  char query[4096], uuid[64];
  uint64_t capacity; /* in bytes */
  int file;          /* of VIXLAB_FILE, or -1 */
  pthread_mutex_t lock;
  pthread_cond_t news, idle; /* a read waits, or the end has come; nothing is under way */
  struct read *first, *last; /* waiting */
  int under_way, closing, in_read;
  pthread_t threads[THREADS];
};

static VixDiskLibGenericLogFunc *log_function;
static pthread_t opener; /* the one thread of opens, closes and queries */
static int opener_known;
static int reads_begun, opens_begun;

/* ── rules and faults ── */

static void broken(const char *rule) {
  fprintf(stderr, "vixdisklib: calling rule broken: %s\n", rule);
  abort();
}

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log_function(format, arguments);
  va_end(arguments);
}

static void initialised(void) {
  if (!log_function) broken("InitEx comes first");
}

static void on_the_opening_thread(void) {
  initialised();
  if (!opener_known) opener = pthread_self(), opener_known = 1;
  if (!pthread_equal(opener, pthread_self())) broken("opens, closes and queries are one thread's");
}

static int setting(const char *name, int field, int otherwise) {
  const char *text = getenv(name);
  for (; text && field; field--)
    if ((text = strchr(text, ':'))) text++;
  return text ? atoi(text) : otherwise;
}

/* Whether the n-th of something is to fail, where `name` says "first:code[:count]" from `field` on. */
static int failing(const char *name, int number, int first, int field) {
  int code = setting(name, field, 0), count = setting(name, field + 1, 1);
  return code && number >= first && number < first + count ? code : VIX_OK;
}

static int misbehave(void) {
  int number = __atomic_add_fetch(&reads_begun, 1, __ATOMIC_SEQ_CST);
  usleep(1000 * setting("VIXLAB_LATENCY_MS", 0, 0));
  if (number == setting("VIXLAB_CRASH_READ", 0, 0)) raise(SIGSEGV);
  while (number == setting("VIXLAB_STALL_READ", 0, 0)) pause();
  return failing("VIXLAB_FAIL_READ", number, setting("VIXLAB_FAIL_READ", 0, 0), 1);
}

/* ── the library ── */

VixError VixDiskLib_InitEx(uint32_t major, uint32_t minor, VixDiskLibGenericLogFunc *log,
                           VixDiskLibGenericLogFunc *warn, VixDiskLibGenericLogFunc *panic, const char *library_dir,
                           const char *config_file) {
  Dl_info self;
  char here[PATH_MAX];
  const char *paths = getenv("LD_LIBRARY_PATH");
  if (log_function) broken("InitEx is called once");
  if (!log || !warn || !panic) broken("log functions are not NULL");
  if (gettid() != getpid()) broken("InitEx is the main thread's");
  if (major < 5 || !library_dir) return VIX_E_INVALID_ARG;
  dladdr(VixDiskLib_InitEx, &self);
  snprintf(here, sizeof here, "%s", self.dli_fname);
  if (!paths || !strstr(paths, dirname(here))) broken("LD_LIBRARY_PATH has the library's folder");
  log_function = log;
  say("vixdisklib: stand-in, version %u.%u, library folder %s, config %s", major, minor, library_dir,
      config_file ? config_file : "none");
  return VIX_OK;
}

void VixDiskLib_Exit(void) { initialised(); }

char *VixDiskLib_GetErrorText(VixError error, const char *locale) {
  char *text;
  (void)locale;
  if (asprintf(&text, "stand-in error %u", (unsigned)(error & 0xffff)) < 0) return NULL;
  return text;
}

void VixDiskLib_FreeErrorText(char *text) { free(text); }

VixDiskLibConnectParams *VixDiskLib_AllocateConnectParams(void) {
  initialised();
  return calloc(1, sizeof(VixDiskLibConnectParams));
}

void VixDiskLib_FreeConnectParams(VixDiskLibConnectParams *params) { free(params); }

static int bad(const VixDiskLibConnectParams *params) {
  return !params || !params->serverName || !params->vmxSpec || strncmp(params->vmxSpec, "moref=", 6) ||
         params->credType != VIXDISKLIB_CRED_UID || !params->creds.uid.userName || !params->creds.uid.password ||
         params->specType != VIXDISKLIB_SPEC_VMX;
}

static struct server server_of(const VixDiskLibConnectParams *params) {
  return (struct server){
      .name = strdup(params->serverName),
      .thumbprint = params->thumbPrint ? strdup(params->thumbPrint) : NULL,
      .user = strdup(params->creds.uid.userName),
      .password = strdup(params->creds.uid.password),
      .port = params->port,
  };
}

static void forget(struct server *server) {
  free(server->name), free(server->thumbprint), free(server->user), free(server->password);
}

/* VMware's library connects lazily: most of what can be wrong shows when a disk is opened. */
VixError VixDiskLib_ConnectEx(const VixDiskLibConnectParams *params, char read_only, const char *snapshot,
                              const char *transport_modes, VixDiskLibConnection *connection) {
  initialised();
  if (bad(params)) return VIX_E_INVALID_ARG;
  *connection = malloc(sizeof **connection);
  **connection = (struct VixDiskLibConnectionStruct){
      .server = server_of(params),
      .vm = strdup(params->vmxSpec + strlen("moref=")),
      .snapshot = strdup(snapshot ? snapshot : ""),
      .modes = strdup(transport_modes ? transport_modes : "nbdssl"),
      .read_only = read_only,
  };
  return VIX_OK;
}

VixError VixDiskLib_Disconnect(VixDiskLibConnection connection) {
  initialised();
  forget(&connection->server);
  free(connection->vm), free(connection->snapshot), free(connection->modes);
  free(connection);
  return VIX_OK;
}

static VixError access_of(const VixDiskLibConnectParams *params, const char *identity, int on) {
  char target[1024], *end = target + sprintf(target, "/vixdisklib/access?vm=");
  size_t length;
  initialised();
  if (bad(params) || !identity) return VIX_E_INVALID_ARG;
  end = quoted(end, params->vmxSpec + strlen("moref="));
  end = quoted(end + sprintf(end, "&identity="), identity);
  sprintf(end, "&on=%d", on);
  struct server server = server_of(params);
  struct link *link = link_new(&server);
  int code = link_get(link, target, NULL, 0, &length);
  link_free(link);
  forget(&server);
  return code;
}

VixError VixDiskLib_PrepareForAccess(const VixDiskLibConnectParams *params, const char *identity) {
  return access_of(params, identity, 1);
}

VixError VixDiskLib_EndAccess(const VixDiskLibConnectParams *params, const char *identity) {
  return access_of(params, identity, 0);
}

VixError VixDiskLib_Cleanup(const VixDiskLibConnectParams *params, uint32_t *cleaned_up, uint32_t *remaining) {
  initialised();
  if (bad(params)) return VIX_E_INVALID_ARG;
  *cleaned_up = *remaining = 0;
  return VIX_OK;
}

/* ── a disk ── */

static int from_file(int file, const struct read *read) {
  ssize_t wanted = read->count * SECTOR;
  return pread(file, read->buffer, wanted, read->start * SECTOR) == wanted ? VIX_OK : VIX_E_FAIL;
}

static int fetch(VixDiskLibHandle handle, struct link *link, const struct read *read) {
  char target[sizeof handle->query + 128];
  size_t length, wanted = read->count * SECTOR;
  int code = misbehave();
  if (code) return code;
  if (handle->file >= 0) return from_file(handle->file, read);
  snprintf(target, sizeof target, "/vixdisklib/read?%s&offset=%lu&length=%lu", handle->query, read->start * SECTOR,
           wanted);
  code = link_get(link, target, read->buffer, wanted, &length);
  if (!code && length != wanted) code = VIX_E_HOST_TCP_CONN_LOST;
  if (!code && getenv("VIXLAB_ZERO_READS")) memset(read->buffer, 0, wanted);
  return code;
}

static struct read *next_read(VixDiskLibHandle handle) {
  struct read *read;
  pthread_mutex_lock(&handle->lock);
  while (!handle->first && !handle->closing) pthread_cond_wait(&handle->news, &handle->lock);
  if ((read = handle->first)) {
    handle->first = read->next;
    if (!handle->first) handle->last = NULL;
  }
  pthread_mutex_unlock(&handle->lock);
  return read;
}

static void *serve(void *argument) {
  VixDiskLibHandle handle = argument;
  struct link *link = link_new(&handle->connection->server);
  for (struct read *read; (read = next_read(handle)); free(read)) {
    read->callback(read->data, fetch(handle, link, read));
    pthread_mutex_lock(&handle->lock);
    if (!--handle->under_way) pthread_cond_broadcast(&handle->idle);
    pthread_mutex_unlock(&handle->lock);
  }
  link_free(link);
  return NULL;
}

static void build_query(VixDiskLibHandle handle, const char *path) {
  char *end = handle->query + sprintf(handle->query, "vm=");
  end = quoted(end, handle->connection->vm);
  end = quoted(end + sprintf(end, "&snapshot="), handle->connection->snapshot);
  quoted(end + sprintf(end, "&path="), path);
}

static int look(VixDiskLibHandle handle) {
  char target[sizeof handle->query + 64];
  char answer[256] = "";
  size_t length;
  snprintf(target, sizeof target, "/vixdisklib/disk?%s", handle->query);
  int code = link_get(handle->link, target, (uint8_t *)answer, sizeof answer - 1, &length);
  if (!code && sscanf(answer, "%lu %63s", &handle->capacity, handle->uuid) != 2) code = VIX_E_FAIL;
  return code;
}

VixError VixDiskLib_Open(VixDiskLibConnection connection, const char *path, uint32_t flags, VixDiskLibHandle *out) {
  on_the_opening_thread();
  if (!connection->read_only || !(flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY)) return VIX_E_FILE_READ_ONLY;
  if (!strstr(connection->modes, "nbd")) return VIX_E_NOT_SUPPORTED;
  if (strlen(path) > 1000) return VIX_E_INVALID_ARG;
  while (getenv("VIXLAB_STALL_OPEN")) pause();
  int code = failing("VIXLAB_FAIL_OPEN", ++opens_begun, 1, 0);
  if (code) return code;
  VixDiskLibHandle handle = calloc(1, sizeof *handle);
  handle->connection = connection;
  handle->link = link_new(&connection->server);
  build_query(handle, path);
  if ((code = look(handle))) {
    link_free(handle->link);
    free(handle);
    return code;
  }
  handle->file = getenv("VIXLAB_FILE") ? open(getenv("VIXLAB_FILE"), O_RDONLY | O_CLOEXEC) : -1;
  pthread_mutex_init(&handle->lock, NULL);
  pthread_cond_init(&handle->news, NULL);
  pthread_cond_init(&handle->idle, NULL);
  for (int i = 0; i < THREADS; i++) pthread_create(&handle->threads[i], NULL, serve, handle);
  *out = handle;
  return VIX_OK;
}

VixError VixDiskLib_Wait(VixDiskLibHandle handle) {
  initialised();
  pthread_mutex_lock(&handle->lock);
  while (handle->under_way) pthread_cond_wait(&handle->idle, &handle->lock);
  pthread_mutex_unlock(&handle->lock);
  return VIX_OK;
}

VixError VixDiskLib_Close(VixDiskLibHandle handle) {
  on_the_opening_thread();
  pthread_mutex_lock(&handle->lock);
  if (handle->under_way) broken("nothing is under way on a handle that is closed");
  handle->closing = 1;
  pthread_cond_broadcast(&handle->news);
  pthread_mutex_unlock(&handle->lock);
  for (int i = 0; i < THREADS; i++) pthread_join(handle->threads[i], NULL);
  link_free(handle->link);
  if (handle->file >= 0) close(handle->file);
  free(handle);
  return VIX_OK;
}

const char *VixDiskLib_GetTransportMode(VixDiskLibHandle handle) {
  return strstr(handle->connection->modes, "nbdssl") ? "nbdssl" : "nbd";
}

VixError VixDiskLib_GetInfo(VixDiskLibHandle handle, VixDiskLibInfo **info) {
  initialised();
  *info = calloc(1, sizeof **info);
  **info = (VixDiskLibInfo){
      .capacity = handle->capacity / SECTOR,
      .numLinks = 1,
      .uuid = strdup(handle->uuid),
      .logicalSectorSize = VIXDISKLIB_SECTOR_SIZE,
      .physicalSectorSize = VIXDISKLIB_SECTOR_SIZE,
  };
  return VIX_OK;
}

void VixDiskLib_FreeInfo(VixDiskLibInfo *info) {
  free(info->uuid);
  free(info);
}

static int outside(VixDiskLibHandle handle, uint64_t start, uint64_t count) {
  uint64_t sectors = handle->capacity / SECTOR;
  return start > sectors || count > sectors - start;
}

VixError VixDiskLib_Read(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint8_t *buffer) {
  struct read read = {.start = start, .count = count, .buffer = buffer};
  initialised();
  if (__atomic_exchange_n(&handle->in_read, 1, __ATOMIC_SEQ_CST) || handle->under_way)
    broken("one read at a time on a handle");
  int code = outside(handle, start, count) ? VIX_E_DISK_OUTOFRANGE : fetch(handle, handle->link, &read);
  handle->in_read = 0;
  return code;
}

VixError VixDiskLib_ReadAsync(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint8_t *buffer,
                              VixDiskLibCompletionCB callback, void *data) {
  initialised();
  if (getenv("VIXLAB_NO_ASYNC")) return VIX_E_NOT_SUPPORTED;
  if (handle->in_read) broken("one read at a time on a handle");
  if (outside(handle, start, count)) return VIX_E_DISK_OUTOFRANGE;
  struct read *read = malloc(sizeof *read);
  *read = (struct read){start, count, buffer, callback, data, NULL};
  pthread_mutex_lock(&handle->lock);
  if (handle->last)
    handle->last->next = read;
  else
    handle->first = read;
  handle->last = read;
  handle->under_way++;
  pthread_cond_signal(&handle->news); /* one thread: to wake all for one read would count against who calls */
  pthread_mutex_unlock(&handle->lock);
  return VIX_ASYNC;
}

/* ── what is allocated ── */

static void query_rules(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint64_t chunk) {
  on_the_opening_thread();
  if (chunk < VIXDISKLIB_MIN_CHUNK_SIZE || (chunk & (chunk - 1))) broken("chunks are a power of 2 of at least 128");
  if (start % chunk || count % chunk) broken("queries are of whole chunks");
  if (count / chunk > VIXDISKLIB_MAX_CHUNK_NUMBER) broken("a query is of 524288 chunks at most");
  if (outside(handle, start, count)) broken("queries end where the disk ends");
}

/* Put the runs that the lab lists into blocks, each of `longest` sectors at most. */
static VixDiskLibBlockList *blocks_of(const char *text, uint64_t longest) {
  uint64_t room = 1024, offset, length;
  VixDiskLibBlockList *list = malloc(sizeof *list + room * sizeof *list->blocks);
  int used;
  for (list->numBlocks = 0; sscanf(text, "%lu %lu\n%n", &offset, &length, &used) == 2; text += used) {
    for (uint64_t end = offset + length, part; offset < end; offset += part) {
      part = end - offset < longest * SECTOR ? end - offset : longest * SECTOR;
      if (list->numBlocks == room) list = realloc(list, sizeof *list + (room *= 2) * sizeof *list->blocks);
      list->blocks[list->numBlocks++] = (VixDiskLibBlock){offset / SECTOR, part / SECTOR};
    }
  }
  return list;
}

VixError VixDiskLib_QueryAllocatedBlocks(VixDiskLibHandle handle, uint64_t start, uint64_t count, uint64_t chunk,
                                         VixDiskLibBlockList **list) {
  char target[sizeof handle->query + 128];
  size_t length, size = 64 * (count / chunk + 1);
  query_rules(handle, start, count, chunk);
  int code = setting("VIXLAB_FAIL_BLOCKS", 0, 0);
  if (code) return code;
  snprintf(target, sizeof target, "/vixdisklib/allocated?%s&offset=%lu&length=%lu&chunk=%lu", handle->query,
           start * SECTOR, count * SECTOR, chunk * SECTOR);
  char *text = calloc(1, size + 1);
  if (handle->file >= 0)
    sprintf(text, "%lu %lu\n", start * SECTOR, count * SECTOR);
  else
    code = link_get(handle->link, target, (uint8_t *)text, size, &length);
  if (!code) *list = blocks_of(text, getenv("VIXLAB_SHORT_BLOCKS") ? chunk : UINT64_MAX / SECTOR);
  free(text);
  return code;
}

VixError VixDiskLib_FreeBlockList(VixDiskLibBlockList *list) {
  free(list);
  return VIX_OK;
}

/* ── what writes is refused ── */

VixError VixDiskLib_Write(VixDiskLibHandle handle, uint64_t start, uint64_t count, const uint8_t *buffer) {
  (void)handle, (void)start, (void)count, (void)buffer;
  return VIX_E_FILE_READ_ONLY;
}

VixError VixDiskLib_WriteAsync(VixDiskLibHandle handle, uint64_t start, uint64_t count, const uint8_t *buffer,
                               VixDiskLibCompletionCB callback, void *data) {
  (void)callback, (void)data;
  return VixDiskLib_Write(handle, start, count, buffer);
}

VixError VixDiskLib_Flush(VixDiskLibHandle handle) {
  (void)handle;
  return VIX_OK;
}

VixError VixDiskLib_Create(VixDiskLibConnection connection, const char *path, const void *create_params,
                           void *progress, void *progress_data) {
  (void)connection, (void)path, (void)create_params, (void)progress, (void)progress_data;
  return VIX_E_FILE_READ_ONLY;
}
