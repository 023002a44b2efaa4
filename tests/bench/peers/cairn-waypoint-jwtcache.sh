cairn_waypoint jwtcache 127.0.0.9 127.0.0.109 true
