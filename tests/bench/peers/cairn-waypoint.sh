cairn_waypoint plain 127.0.0.4 127.0.0.104 false
