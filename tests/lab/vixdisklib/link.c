#define _GNU_SOURCE
#include "link.h"

#include <netdb.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vixdisklib.h"

struct link {
  const struct server *server;
  SSL_CTX *context;
  SSL *ssl; /* NULL: not connected */
  int fd;
  char authorisation[1024];
};

struct link *link_new(const struct server *server) {
  struct link *link = calloc(1, sizeof *link);
  char plain[600];
  link->server = server;
  link->context = SSL_CTX_new(TLS_client_method());
  int length = snprintf(plain, sizeof plain, "%s:%s", server->user, server->password);
  EVP_EncodeBlock((unsigned char *)link->authorisation, (unsigned char *)plain, length);
  return link;
}

static void hang_up(struct link *link) {
  if (!link->ssl) return;
  SSL_free(link->ssl);
  close(link->fd);
  link->ssl = NULL;
}

void link_free(struct link *link) {
  hang_up(link);
  SSL_CTX_free(link->context);
  free(link);
}

char *quoted(char *end, const char *text) {
  for (; *text; text++) {
    unsigned char c = *text;
    if (strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.", c))
      *end++ = c;
    else
      end += sprintf(end, "%%%02X", c);
  }
  *end = 0;
  return end;
}

/* Whether the certificate shown has the SHA-1 thumbprint given. VDDK compares it when a disk is opened. */
static int thumbprint_fits(struct link *link) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  char text[64], *end = text;
  X509 *shown = SSL_get1_peer_certificate(link->ssl);
  if (!shown || !X509_digest(shown, EVP_sha1(), digest, &length)) return 0;
  X509_free(shown);
  for (unsigned int i = 0; i < length; i++) end += sprintf(end, "%s%02X", i ? ":" : "", digest[i]);
  return link->server->thumbprint && !strcasecmp(text, link->server->thumbprint);
}

static int connected_socket(const struct server *server, int *code) {
  char port[16];
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
  snprintf(port, sizeof port, "%u", server->port ? server->port : 443);
  *code = VIX_E_HOST_SERVER_NOT_FOUND;
  if (getaddrinfo(server->name, port, &hints, &found)) return -1;
  *code = VIX_E_HOST_NETWORK_CONN_REFUSED;
  int fd = -1;
  for (struct addrinfo *each = found; each && fd < 0; each = each->ai_next) {
    fd = socket(each->ai_family, each->ai_socktype | SOCK_CLOEXEC, each->ai_protocol);
    if (fd >= 0 && connect(fd, each->ai_addr, each->ai_addrlen)) {
      close(fd);
      fd = -1;
    }
  }
  freeaddrinfo(found);
  return fd;
}

static int dial(struct link *link) {
  int code = VIX_OK;
  if (link->ssl) return VIX_OK;
  link->fd = connected_socket(link->server, &code);
  if (link->fd < 0) return code;
  link->ssl = SSL_new(link->context);
  SSL_set_fd(link->ssl, link->fd);
  if (SSL_connect(link->ssl) != 1)
    code = VIX_E_HOST_NETWORK_CONN_REFUSED;
  else
    code = thumbprint_fits(link) ? VIX_OK : VIX_E_FAIL;
  if (code) hang_up(link);
  return code;
}

/* Read the head of a reply into `head`, byte for byte, so that nothing of the body is taken with it. */
static int read_head(struct link *link, char *head, size_t size) {
  size_t got = 0;
  while (got + 1 < size && !(got >= 4 && !memcmp(head + got - 4, "\r\n\r\n", 4)))
    if (SSL_read(link->ssl, head + got, 1) != 1)
      return -1;
    else
      got++;
  head[got] = 0;
  return 0;
}

static int read_body(struct link *link, uint8_t *body, size_t length) {
  while (length) {
    int got = SSL_read(link->ssl, body, length > 1 << 30 ? 1 << 30 : (int)length);
    if (got <= 0) return -1;
    body += got;
    length -= got;
  }
  return 0;
}

/* `Connection: close` is not asked for: a reply without a length is one in chunks, which the lab sends for lists. */
static int read_chunks(struct link *link, uint8_t *body, size_t size, size_t *length) {
  char line[32], end[2];
  for (*length = 0;;) {
    size_t got = 0;
    do {
      if (got + 1 >= sizeof line || SSL_read(link->ssl, line + got, 1) != 1) return -1;
    } while (line[got++] != '\n');
    size_t chunk = strtoul(line, NULL, 16);
    if (*length + chunk > size || read_body(link, body + *length, chunk) || read_body(link, (uint8_t *)end, 2))
      return -1;
    if (!chunk) return 0;
    *length += chunk;
  }
}

static int reply(struct link *link, uint8_t *body, size_t size, size_t *length) {
  char head[4096], refusal[64];
  if (read_head(link, head, sizeof head)) return VIX_E_HOST_TCP_CONN_LOST;
  int status = atoi(head + strlen("HTTP/1.1 "));
  char *field = strcasestr(head, "\r\nContent-Length:");
  *length = field ? strtoul(field + strlen("\r\nContent-Length:"), NULL, 10) : 0;
  if (status != 200) {
    size_t room = *length < sizeof refusal - 1 ? *length : sizeof refusal - 1;
    if (read_body(link, (uint8_t *)refusal, room) || room != *length) return VIX_E_HOST_TCP_CONN_LOST;
    refusal[room] = 0;
    return atoi(refusal) ? atoi(refusal) : VIX_E_FAIL;
  }
  if (!field) return read_chunks(link, body, size, length) ? VIX_E_HOST_TCP_CONN_LOST : VIX_OK;
  return *length > size || read_body(link, body, *length) ? VIX_E_HOST_TCP_CONN_LOST : VIX_OK;
}

int link_get(struct link *link, const char *target, uint8_t *body, size_t size, size_t *length) {
  char request[8192];
  int code = dial(link);
  if (code) return code;
  int count = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: lab\r\nAuthorization: Basic %s\r\n\r\n", target,
                       link->authorisation);
  if (count >= (int)sizeof request) return VIX_E_INVALID_ARG;
  code = SSL_write(link->ssl, request, count) == count ? reply(link, body, size, length) : VIX_E_HOST_TCP_CONN_LOST;
  if (code == VIX_E_HOST_TCP_CONN_LOST) hang_up(link);
  return code;
}
