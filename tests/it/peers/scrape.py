"""Reads a scrape from standard input with Prometheus' own parser, strictly, and prints its samples as JSON."""

import json
import sys

from prometheus_client.parser import text_string_to_metric_families

text = sys.stdin.read()
seen = set()
samples = []
for family in text_string_to_metric_families(text):
    for sample in family.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        if key in seen:
            sys.exit(f"twice: {key}")
        seen.add(key)
        samples.append({"family": family.name, "type": family.type, "name": sample.name, "labels": sample.labels,
                        "value": sample.value})
print(json.dumps(samples))
