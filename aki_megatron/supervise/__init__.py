"""What keeps a long job alive: failure reports, watchdog, heartbeats, attempts, status, pre-flight."""
