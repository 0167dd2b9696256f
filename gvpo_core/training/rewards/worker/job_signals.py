"""The signals that end a process unless it handles them, as a scheduler, a watchdog or a person sends them."""

import signal

_OF_THE_PROCESS = (  # its own faults; what a debugger or Python takes; what does not end it
    *("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGEMT"),
    *("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO"),
)
TERMINATING = frozenset(int(number) for number in signal.valid_signals()) - {
    int(getattr(signal, name)) for name in _OF_THE_PROCESS if hasattr(signal, name)
}
