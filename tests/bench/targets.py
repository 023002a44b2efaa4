#!/usr/bin/env python3
"""targets.py RESULTS-DIRECTORY: the figures that Cairn aims at, beside what was measured. Ratios are medians of the ratios
within each interleaved repetition, so that what disturbs a repetition disturbs both sides of it."""
import json, statistics, sys

D = sys.argv[1]


def rows(file):
    found = {}
    for line in open(f"{D}/{file}.jsonl"):
        row = json.loads(line)
        found.setdefault(row.get("label"), []).append(row)
    return found


load, idle = rows("bench"), rows("startup")


def ratio(ours, theirs, column="cpu_us_per_req"):
    pairs = zip((r[column] for r in load[ours]), (r[column] for r in load[theirs]))
    values = [a / b for a, b in pairs]
    return statistics.median(values), min(values), max(values)


def show(what, value, limit, text):
    print(f"{what:<66} {text:<26} at most {limit:<6} {'met' if value <= limit else 'MISSED'}")


for ours, theirs, limit in (
    ("cairn-waypoint", "envoy-waypoint-rbac", 0.5),
    ("cairn-waypoint-jwtcache", "envoy-waypoint-jwtcache", 0.4),
    ("cairn-waypoint-auth", "envoy-waypoint-auth", 0.5),
    ("cairn-ztunnel", "envoy-hbone-l4", 0.95),
):
    median, low, high = ratio(ours, theirs)
    show(f"CPU per request, {ours} / {theirs}", median, limit, f"{median:.3f} ({low:.3f}..{high:.3f})")
for name, what, limit in (("cairn-waypoint-tag1", "idle waypoint with one plugin", 25), ("cairn-ztunnel", "idle ztunnel", 12)):
    mib = [row["rss_kib"] / 1024 for row in idle[name]]
    median = statistics.median(mib)
    show(f"resident memory, {what}, MiB", median, limit, f"{median:.1f} ({min(mib):.1f}..{max(mib):.1f})")
print()
for ours, theirs in (("cairn-waypoint-log", "envoy-waypoint-rbac-log"), ("cairn-waypoint-hdr1", "envoy-waypoint-rbac-hdr1")):
    median, low, high = ratio(ours, theirs)
    print(f"CPU per request, {ours} / {theirs}: {median:.3f} ({low:.3f}..{high:.3f})")
