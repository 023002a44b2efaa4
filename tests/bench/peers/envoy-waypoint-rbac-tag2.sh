envoy_peer envoy-waypoint-rbac-tag2 10044 hbone
