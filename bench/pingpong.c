// SPDX-License-Identifier: Apache-2.0
/* The two ends of a flow, as bare as they can be, so that what lies between them shows.
 *
 *   pingpong serve PORT                     answer every byte, or swallow what comes without asking
 *   pingpong rr ADDRESS PORT SECONDS        one byte there and back, on one connection
 *   pingpong crr ADDRESS PORT SECONDS       the same, a connection each, closed by RST
 *   pingpong bulk ADDRESS PORT SECONDS      as many bytes as go there
 *   pingpong whole DEVICE                   switch segmentation and its undoing off: a packet is a packet
 *
 * A client prints what it did in a second: round trips, connections or bytes.  Built and run by
 * bench.traffic_ratio.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ASK = 'a', SWALLOW = 's' };

static void check(int failed, const char *what)
{
	if (failed) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct sockaddr_in at(const char *address, const char *port)
{
	struct sockaddr_in found = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	check(inet_pton(AF_INET, address, &found.sin_addr) != 1, address);
	return found;
}

static void no_delay(int fd)
{
	int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static int dial(const struct sockaddr_in *server)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	check(fd < 0, "socket");
	check(connect(fd, (const struct sockaddr *)server, sizeof(*server)), "connect");
	no_delay(fd);
	return fd;
}

static void ask(int fd)
{
	char byte = ASK;

	check(send(fd, &byte, 1, 0) != 1, "send");
	check(recv(fd, &byte, 1, 0) != 1, "recv");
}

static void serve(const char *port)
{
	struct sockaddr_in here = at("0.0.0.0", port);
	int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	static char buffer[1 << 18];

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	check(bind(listener, (struct sockaddr *)&here, sizeof(here)), "bind");
	check(listen(listener, 64), "listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		ssize_t got;

		if (fd < 0)
			continue;
		no_delay(fd);
		while ((got = recv(fd, buffer, sizeof(buffer), 0)) > 0)
			if (buffer[0] == ASK && send(fd, buffer, got, 0) < 0)
				break;
		close(fd);
	}
}

static double round_trips(const struct sockaddr_in *server, double seconds)
{
	int fd = dial(server);
	double start = now();
	long count = 0;

	for (; now() - start < seconds; count++)
		ask(fd);
	return count / (now() - start);
}

static double connections(const struct sockaddr_in *server, double seconds)
{
	const struct linger reset = {.l_onoff = 1, .l_linger = 0};
	double start = now();
	long count = 0;

	for (; now() - start < seconds; count++) {
		int fd = dial(server);

		ask(fd);
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(fd);
	}
	return count / (now() - start);
}

static double bytes(const struct sockaddr_in *server, double seconds)
{
	static char buffer[1 << 16];
	int fd = dial(server);
	double start = now(), sum = 0;

	memset(buffer, SWALLOW, sizeof(buffer));
	while (now() - start < seconds) {
		ssize_t sent = send(fd, buffer, sizeof(buffer), 0);

		check(sent < 0, "send");
		sum += sent;
	}
	return sum / (now() - start);
}

static void whole(const char *device)
{
	static const __u32 features[] = {ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	for (size_t i = 0; i < sizeof(features) / sizeof(*features); i++) {
		struct ethtool_value off = {.cmd = features[i]};
		struct ifreq request = {.ifr_data = (char *)&off};

		snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", device);
		check(ioctl(fd, SIOCETHTOOL, &request), device);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in server;
	double seconds;

	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(argv[2]);
	if (argc == 3 && !strcmp(argv[1], "whole")) {
		whole(argv[2]);
		return 0;
	}
	if (argc != 5) {
		fprintf(stderr, "see the head of pingpong.c\n");
		return 2;
	}
	server = at(argv[2], argv[3]);
	seconds = atof(argv[4]);
	if (!strcmp(argv[1], "rr"))
		printf("%f\n", round_trips(&server, seconds));
	else if (!strcmp(argv[1], "crr"))
		printf("%f\n", connections(&server, seconds));
	else
		printf("%f\n", bytes(&server, seconds));
	return 0;
}
