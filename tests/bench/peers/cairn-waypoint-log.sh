cairn_waypoint log 127.0.0.5 127.0.0.105 true
