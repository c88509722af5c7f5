// Code inside of the server: replaces getaddrinfo(3), and prints what it may do there, as NAME=ERRNO on stderr.
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <unistd.h>

#define PROBE(name, call) (errno = 0, (void)!(call), dprintf(2, "probe %s=%d\n", name, errno))

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **res) {
    char *const args[] = {"true", NULL};
    PROBE("read", open(getenv("PROBE_USERS"), O_RDONLY));
    PROBE("shadow", open("/etc/shadow", O_RDONLY));
    PROBE("secret", open(getenv("PROBE_SECRET"), O_RDONLY));
    PROBE("overwrite", open(getenv("PROBE_USERS"), O_WRONLY));
    PROBE("create", open("/tmp/s5-probe", O_WRONLY | O_CREAT, 0600));
    PROBE("remove", unlink(getenv("PROBE_USERS")));
    PROBE("exec", execv("/bin/true", args));
    PROBE("fork", fork());
    PROBE("ptrace", ptrace(PTRACE_TRACEME, 0, NULL, NULL));
    PROBE("raw", socket(AF_INET, SOCK_RAW, 1));
    PROBE("packet", socket(AF_PACKET, SOCK_DGRAM, 0));
    PROBE("stream", socket(AF_INET, SOCK_STREAM, 0));
    PROBE("setuid", setuid(0));
    PROBE("kill", kill(getppid(), 0));
    PROBE("dumpable", prctl(PR_SET_DUMPABLE, 1));
    PROBE("type", ioctl(0, TIOCSTI, "x"));
    PROBE("spawn", errno = posix_spawn(NULL, "/bin/true", NULL, NULL, args, NULL));
    dprintf(2, "probe end\n");
    return EAI_NONAME;
}
