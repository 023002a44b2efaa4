cairn_waypoint noop2 127.0.0.11 127.0.0.111 false
