/* Preloaded: a program that refuses to run as root takes its user for `nobody`. */
#include <unistd.h>

uid_t getuid(void)
{
    return 65534;
}

uid_t geteuid(void)
{
    return 65534;
}
