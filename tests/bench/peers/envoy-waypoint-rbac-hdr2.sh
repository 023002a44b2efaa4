envoy_peer envoy-waypoint-rbac-hdr2 10040 hbone
