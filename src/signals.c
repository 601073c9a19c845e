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

static void handle_by(void (*handler)(int))
{
    struct sigaction a = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    sigaction(SIGINT, &a, NULL);
}

void md_signals_catch(void)
{
    handle_by(on_signal);
}

void md_signals_release(void)
{
    handle_by(SIG_DFL);
}

bool md_signals_came(void)
{
    return came != 0;
}
