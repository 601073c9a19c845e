/* signals: see signals.h. */
#include "src/signals.h"

#include <signal.h>

static volatile sig_atomic_t came;

static void on_signal(int number)
{
    came = number;
    if (number == SIGINT)
        signal(SIGINT, SIG_DFL);
}

void md_signals_catch(void)
{
    struct sigaction a = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGINT, &a, NULL);
}

bool md_signals_came(void)
{
    return came != 0;
}
