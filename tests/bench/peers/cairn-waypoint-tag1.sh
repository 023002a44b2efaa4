cairn_waypoint tag1 127.0.0.7 127.0.0.107 false
