"""Ending and resuming runs in order: watchdog, signals, values that are not finite, exit statuses.

    heartbeat.py         what a rank is doing
    watchdog.py          hung, dead and failed ranks
    signals.py           stopping on SIGTERM, SIGINT and SIGUSR1
    nonfinite.py         diagnosis of a step with NaN or Inf
    nonfinite_tracer.py  the hooks that find where it arose
    loss_spikes.py       spikes of the training loss
    exceptions.py        exceptions that end a run
    exit_codes.py        exit statuses of a run

docs/reliability.md says what is guaranteed, and how it is tested.
"""
