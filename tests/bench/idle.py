#!/usr/bin/env python3
"""One start of a proxy: idle.py NAME READY COMMAND... prints one JSON line; idle.py --table FILE prints medians (min..max)."""
import json, os, socket, statistics, subprocess, sys, time

READY_MAX, SETTLE = 180.0, 1.5  # seconds; a firewall of 16 MiB takes half a minute to compile


def is_ready(ready):
    at, _, path = ready.removeprefix("http://").partition("/")
    host, port = at.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=1) as s:
            if not ready.startswith("http://"):
                return True
            s.sendall(f"GET /{path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n".encode())
            return b" 200 " in s.recv(64)
    except OSError:
        return False


def cpu_ns(pid):
    tasks = os.listdir(f"/proc/{pid}/task")
    return sum(int(open(f"/proc/{pid}/task/{t}/schedstat").read().split()[0]) for t in tasks)


def cpu_ms_ever(pid):
    """With threads that have ended, such as the one that compiled a plugin."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


def measure(name, ready, command):
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not is_ready(ready):
        if time.perf_counter() - start > READY_MAX or process.poll() is not None:
            process.kill()
            sys.exit(f"{name} did not become ready")
        time.sleep(0.0005)
    start_ms = (time.perf_counter() - start) * 1e3
    time.sleep(SETTLE)  # what is measured is the process at rest
    pid = process.pid
    rollup = dict(line.split()[:2] for line in open(f"/proc/{pid}/smaps_rollup") if line.split()[0].endswith(":"))
    startup_ms, before = cpu_ms_ever(pid), cpu_ns(pid)
    time.sleep(1.0)
    idle = cpu_ns(pid) - before
    threads = len(os.listdir(f"/proc/{pid}/task"))
    process.kill()
    process.wait()
    kib = {f"{k.lower()}_kib": int(rollup[f"{k}:"]) for k in ("Rss", "Pss", "Anonymous", "Private_Dirty")}
    return dict(label=name, start_ms=start_ms, **kib, threads=threads, startup_cpu_ms=startup_ms, idle_cpu_us_per_s=idle / 1e3)


def table(file):
    rows = {}
    for line in open(file):
        row = json.loads(line)
        rows.setdefault(row.pop("label"), []).append(row)
    columns = list(next(iter(rows.values()))[0])
    print("| peer | n | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name, values in rows.items():
        of = lambda c: [v[c] for v in values]
        cells = (f"{statistics.median(of(c)):.1f} ({min(of(c)):.1f}..{max(of(c)):.1f})" for c in columns)
        print(f"| {name} | {len(values)} | " + " | ".join(cells) + " |")


if sys.argv[1] == "--table":
    table(sys.argv[2])
else:
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3:])))
