/* What a reader is measured against: `preads FILE TARGET LATENCY_MS DEPTH REQUEST_BYTES`, a copy as fast as C makes it.
 *
 * DEPTH threads take requests in turn; each waits for the latency, preads, and pwrites past the page cache, where the
 * target lets it. The target `-` is memory: each request is copied once there, as a reader's user would. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int file, target, latency_ms;
static uint64_t size, request, next;

static void *serve(void *unused) {
  (void)unused;
  void *into, *copied;
  if (posix_memalign(&into, 4096, request) || posix_memalign(&copied, 4096, request)) exit(1);
  for (uint64_t at; (at = __atomic_fetch_add(&next, request, __ATOMIC_SEQ_CST)) < size;) {
    ssize_t wanted = size - at < request ? size - at : request;
    usleep(1000 * latency_ms);
    if (pread(file, into, wanted, at) != wanted) perror("pread"), exit(1);
    if (target < 0) {
      memcpy(copied, into, wanted);
      __asm__ volatile("" : : "r"(copied) : "memory"); /* or the copy would be left out */
    } else if (pwrite(target, into, wanted, at) != wanted) perror("pwrite"), exit(1);
  }
  free(into), free(copied);
  return NULL;
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  struct stat found;
  pthread_t threads[64];
  int depth = atoi(argv[4]), flags = O_WRONLY | O_CREAT | O_TRUNC;
  file = open(argv[1], O_RDONLY);
  if (file < 0 || fstat(file, &found) || depth < 1 || depth > 64) return 1;
  int memory = !strcmp(argv[2], "-");
  target = memory ? -1 : open(argv[2], flags | O_DIRECT, 0600);
  if (!memory && target < 0) target = open(argv[2], flags, 0600);
  size = found.st_size, latency_ms = atoi(argv[3]), request = strtoull(argv[5], NULL, 10);
  if (!memory && (target < 0 || ftruncate(target, size))) return 1;
  for (int i = 0; i < depth; i++) pthread_create(&threads[i], NULL, serve, NULL);
  for (int i = 0; i < depth; i++) pthread_join(threads[i], NULL);
  return !memory && fdatasync(target) != 0;
}
