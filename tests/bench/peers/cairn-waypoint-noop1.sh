cairn_waypoint noop1 127.0.0.10 127.0.0.110 false
