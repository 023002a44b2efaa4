envoy_peer envoy-waypoint-rbac-hdr1 10018 hbone
