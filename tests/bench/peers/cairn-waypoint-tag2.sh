cairn_waypoint tag2 127.0.0.13 127.0.0.113 false
