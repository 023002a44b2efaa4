cairn_waypoint_kept tag1 127.0.0.7 127.0.0.107 cold
