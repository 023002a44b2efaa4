cairn_waypoint hdr2 127.0.0.12 127.0.0.112 false
