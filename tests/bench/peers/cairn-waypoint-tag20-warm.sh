cairn_waypoint_kept tag20 127.0.0.17 127.0.0.117 warm
