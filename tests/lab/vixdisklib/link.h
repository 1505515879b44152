/* One kept-alive HTTPS connection to the lab, found by nothing but what a caller's connect parameters say. */
#ifndef LINK_H
#define LINK_H

#include <stddef.h>
#include <stdint.h>

struct server {
  char *name, *thumbprint, *user, *password;
  uint32_t port;
};

struct link; /* used by one thread at a time */

struct link *link_new(const struct server *server);
void link_free(struct link *link);

/* Ask for `target` (path and query); put the body into `body`, of `size` bytes. Returns a VIX error code: what the lab
 * refuses with, or what went wrong on the way. `*length` is how much came. */
int link_get(struct link *link, const char *target, uint8_t *body, size_t size, size_t *length);

/* Append `text` to the string at `end`, quoted for a query. Returns the new end. */
char *quoted(char *end, const char *text);

#endif
