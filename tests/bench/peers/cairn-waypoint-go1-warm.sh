cairn_waypoint_kept go1 127.0.0.15 127.0.0.115 warm
