envoy_peer envoy-waypoint-rbac-log 10017 hbone
