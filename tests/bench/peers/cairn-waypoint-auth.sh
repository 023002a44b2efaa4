cairn_waypoint auth 127.0.0.8 127.0.0.108 true
CMD+=(--token-cache false)
