cairn_waypoint hdr1 127.0.0.6 127.0.0.106 false
