/* signals: USR1, TERM and INT as a wish to stop, which a program that keeps its state follows at
 * the next point where it can: job schedulers send them before a job's time is over. */
#ifndef MD_SIGNALS_H
#define MD_SIGNALS_H

#include "src/base.h"

/* From now on the three only raise a flag; a second INT (Ctrl-C) ends the program at once. Local.
 */
void md_signals_catch(void);
/* From now on they do again what they do to any program. Local. */
void md_signals_release(void);
/* Whether one of them has come. Local: ranks have to agree on it. */
bool md_signals_came(void);

#endif
