"""Drives a daemon through the qemu.qmp package: python3 qmp_client.py SOCKET IMAGE MOUNTPOINT.

Prints one line of JSON with what it saw; the test beside it judges.
"""

import asyncio
import json
import os
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(socket, image, mountpoint):
    seen = {}
    client = QMPClient('test')
    await client.connect(socket)
    seen['greeting'] = client.greeting._asdict()['QMP']['version']['qemu'].keys() >= {'major', 'minor', 'micro'}
    seen['commands'] = sorted(c['name'] for c in await client.execute('query-commands'))
    await client.execute('blockdev-add', {
        'driver': 'qcow2', 'node-name': 'disk', 'file': {'driver': 'file', 'filename': image}})
    await client.execute('block-export-add', {
        'type': 'fuse', 'id': 'export', 'node-name': 'disk', 'mountpoint': mountpoint, 'writable': True})
    seen['size'] = os.stat(mountpoint).st_size
    with open(mountpoint, 'r+b') as disk:
        disk.write(b'written by a Python client')
    seen['exports'] = await client.execute('query-block-exports')
    try:
        await client.execute('blockdev-del', {'node-name': 'disk'})
    except ExecuteError as refused:
        answer = refused.error.error
        seen['error'] = [answer.class_, answer.desc]
    # A crowd of commands under way at once, each answered to the one who asked.
    nodes = await asyncio.gather(*(client.execute('query-named-block-nodes', {'flat': True}) for _ in range(50)))
    seen['crowd'] = len(nodes)
    with client.listener('BLOCK_EXPORT_DELETED') as deleted:
        await client.execute('block-export-del', {'id': 'export'})
        event = await asyncio.wait_for(deleted.get(), 30)
        seen['event'] = event['data']
    await client.execute('blockdev-del', {'node-name': 'disk'})
    await client.execute('quit')
    try:
        await client.disconnect()
    except EOFError:
        pass  # the daemon, told to quit, has closed the connection first
    print(json.dumps(seen))


asyncio.run(main(*sys.argv[1:]))
