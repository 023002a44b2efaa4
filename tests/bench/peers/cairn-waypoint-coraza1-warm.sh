cairn_waypoint_kept coraza1 127.0.0.16 127.0.0.116 warm
