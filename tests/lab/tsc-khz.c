// Prints the frequency of this host's time stamp counter in kHz, measured against CLOCK_MONOTONIC for 0.1 s.
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static unsigned long long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

int main(void) {
    unsigned long long start = nanoseconds(), ticks = __rdtsc(), end;
    while ((end = nanoseconds()) - start < 100000000ULL) {
    }
    printf("%.0f\n", (__rdtsc() - ticks) * 1e6 / (end - start));
    return 0;
}
