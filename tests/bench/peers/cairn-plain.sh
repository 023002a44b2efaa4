# From the pod at 127.0.0.3 by SOCKS5, and on in plaintext to the backend, which is outside the mesh.
cairn_ztunnel
SHARE=cairn-ztunnel
LOAD=(--transport socks5 --target 127.0.0.3:15080 --authority 127.0.0.1:9000)
BULK=(--transport socks5 --target 127.0.0.3:15080 --authority 127.0.0.1:9001)
