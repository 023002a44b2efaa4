#!/usr/bin/env python3
"""targets.py RESULTS-DIRECTORY [plugins]: the figures that Cairn aims at, beside what was measured. Ratios are medians of the
ratios within each interleaved repetition, so that what disturbs a repetition disturbs both sides of it."""
import json, os, statistics, sys

D = sys.argv[1]


def rows(file):
    found = {}
    if os.path.exists(f"{D}/{file}.jsonl"):
        for line in open(f"{D}/{file}.jsonl"):
            row = json.loads(line)
            found.setdefault(row.get("label"), []).append(row)
    return found


def spread(values, form=".3f"):
    """The median, and what is written of it."""
    values = list(values)
    median = statistics.median(values)
    return median, f"{median:{form}} ({min(values):{form}}..{max(values):{form}})"


def show(what, measured, limit):
    value, text = measured
    print(f"{what:<78} {text:<26} at most {limit:<6} {'met' if value <= limit else 'MISSED'}")


def show_load():
    load, idle = rows("bench"), rows("startup")

    def ratio(ours, theirs):
        pairs = zip(load[ours], load[theirs])
        return spread(a["cpu_us_per_req"] / b["cpu_us_per_req"] for a, b in pairs)

    for ours, theirs, limit in (
        ("cairn-waypoint", "envoy-waypoint-rbac", 0.5),
        ("cairn-waypoint-jwtcache", "envoy-waypoint-jwtcache", 0.4),
        ("cairn-waypoint-auth", "envoy-waypoint-auth", 0.5),
        ("cairn-ztunnel", "envoy-hbone-l4", 0.95),
    ):
        show(f"CPU per request, {ours} / {theirs}", ratio(ours, theirs), limit)
    for name, what, limit in (("cairn-waypoint-tag1", "idle waypoint with one plugin", 25), ("cairn-ztunnel", "idle ztunnel", 12)):
        show(f"resident memory, {what}, MiB", spread((row["rss_kib"] / 1024 for row in idle[name]), ".1f"), limit)
    print()
    for ours, theirs in (("cairn-waypoint-log", "envoy-waypoint-rbac-log"), ("cairn-waypoint-hdr1", "envoy-waypoint-rbac-hdr1")):
        print(f"CPU per request, {ours} / {theirs}: {ratio(ours, theirs)[1]}")


def show_plugins():
    load, bodies, starts, large = rows("plugins"), rows("plugin-bodies"), rows("plugin-starts"), rows("plugin-large")

    def added(found, with_it, without, column):
        return [a[column] - b[column] for a, b in zip(found[with_it], found[without])]

    def cpu(found, what, limit, name, before):
        """What a plugin adds here, against what it adds in Envoy: medians of differences within repetitions."""
        ours = spread(added(found, f"cairn-waypoint{name}", f"cairn-waypoint{before}", "cpu_us_per_req"), ".2f")
        theirs = spread(added(found, f"envoy-waypoint-rbac{name}", f"envoy-waypoint-rbac{before}", "cpu_us_per_req"), ".2f")
        show(f"{what}: µs added / in Envoy {theirs[1]}", (ours[0] / max(theirs[0], 0.01), f"{ours[1]}"), limit)

    for plugin, what, limit in (("noop", "empty callbacks", 0.3), ("hdr", "one header each way, without an SDK", 0.3), ("tag", "one header each way, Rust SDK", 0.3)):
        cpu(load, what, limit, f"-{plugin}1", "")
        cpu(load, f"{what}, the next one", limit, f"-{plugin}2", f"-{plugin}1")
    cpu(bodies, "a body of 10 KiB read and written", 0.6, "-body1", "")

    def start(found, ours, theirs, limit):
        """From a module to serving: what it adds to the start of each."""
        if not found.get(ours):
            return
        mine = spread((row["start_ms"] - plain("cairn-waypoint") for row in found[ours]), ".0f")
        other = spread((row["start_ms"] - plain("envoy-waypoint-rbac") for row in found[theirs]), ".0f")
        show(f"ms until {ours} serves / in Envoy {other[1]}", (mine[0] / max(other[0], 0.1), mine[1]), limit)

    def plain(name):
        return statistics.median(row["start_ms"] for row in starts[name])

    if not starts:
        print("start-up and memory were not measured")
        return
    start(starts, "cairn-waypoint-tag1-cold", "envoy-waypoint-rbac-tag1", 2)
    start(starts, "cairn-waypoint-tag1-warm", "envoy-waypoint-rbac-tag1", 0.1)
    for module in ("go1", "coraza1"):
        start(large, f"cairn-waypoint-{module}-cold", f"envoy-waypoint-rbac-{module}", 1)
        start(large, f"cairn-waypoint-{module}-warm", f"envoy-waypoint-rbac-{module}", 0.1)
    for name in ("tag20", "mix20"):
        pairs = zip(starts[f"cairn-waypoint-{name}-warm"], starts["envoy-waypoint-rbac-tag1"])
        show(f"start with 20 plugins, warm ({name}) / Envoy's with one", spread(a["start_ms"] / b["start_ms"] for a, b in pairs), 0.5)
    mib = lambda name, before, count: spread((kib / 1024 / count for kib in added(starts, name, before, "rss_kib")), ".2f")
    for name in ("cairn-waypoint-tag1", "cairn-waypoint-tag1-warm"):
        show(f"resident memory, MiB of the first plugin, {name}", mib(name, "cairn-waypoint", 1), 6)
    for name in ("tag20", "mix20"):
        show(f"the same, each further one, {name}", mib(f"cairn-waypoint-{name}-warm", "cairn-waypoint-tag1-warm", 19), 1)


show_plugins() if sys.argv[2:] == ["plugins"] else show_load()
