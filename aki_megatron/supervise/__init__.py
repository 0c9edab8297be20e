"""Supervision of a long run: failure reports, watchdog, heartbeats, attempts, loss spikes, status, pre-flight check."""
