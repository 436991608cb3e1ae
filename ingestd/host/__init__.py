"""The machine around the daemon: signals, service manager, sockets, process, data directory."""
