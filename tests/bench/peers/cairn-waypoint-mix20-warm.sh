cairn_waypoint_kept mix20 127.0.0.18 127.0.0.118 warm
