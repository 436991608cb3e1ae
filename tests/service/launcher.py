"""launcher.py NAMES FDS COMMAND…: becomes the command, with sockets passed as systemd does it."""

import fcntl
import os
import sys

names, fds, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in fds.split(",")]
for fd in fds.split(","):
    os.close(int(fd))
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
facts = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high))}
if names:
    facts["LISTEN_FDNAMES"] = names
if os.environ.get("NOTIFY_SOCKET"):
    facts["WATCHDOG_PID"] = str(os.getpid())
os.execve(command[0], command, {**facts, **os.environ})
