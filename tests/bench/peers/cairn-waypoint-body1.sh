cairn_waypoint body1 127.0.0.14 127.0.0.114 false
