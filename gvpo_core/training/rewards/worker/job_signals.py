"""The signals from schedulers, watchdogs or people that end a process unless it handles them."""

import signal

_OF_THE_PROCESS = (  # faults of the process, signals that debuggers or Python use, and signals that do not end it
    *("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGEMT"),
    *("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO"),
)
TERMINATING = frozenset(int(number) for number in signal.valid_signals()) - {
    int(getattr(signal, name)) for name in _OF_THE_PROCESS if hasattr(signal, name)
}
