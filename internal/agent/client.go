// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// maxStatusLine bounds one answer of the control socket, in bytes.
const maxStatusLine = 4 << 20

// Client talks to an agent's control socket.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the control socket at path. It connects at each
// call and holds nothing open between calls.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext: dial, DisableKeepAlives: true, ResponseHeaderTimeout: time.Minute,
	}}}
}

// Start asks the agent for its half of a migration and returns once the agent has
// taken it on: at a destination that is when its QEMU listens, at a source when
// the engine runs.
func (c *Client) Start(ctx context.Context, spec Spec) (Status, error) {
	body, err := json.Marshal(spec)
	if err != nil {
		return Status{}, fmt.Errorf("encoding the request: %w", err)
	}
	var st Status
	err = c.call(ctx, http.MethodPost, "/v1/migrations", bytes.NewReader(body), &st)
	return st, err
}

// Get returns how a migration stands.
func (c *Client) Get(ctx context.Context, id string) (Status, error) {
	var st Status
	err := c.call(ctx, http.MethodGet, "/v1/migrations/"+id, nil, &st)
	return st, err
}

// Cancel asks for the end of a migration that has not passed the switch of the
// CPU; afterwards it is refused.
func (c *Client) Cancel(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/migrations/"+id, nil, &Status{})
}

// Node returns the agent's own status.
func (c *Client) Node(ctx context.Context) (NodeStatus, error) {
	var st NodeStatus
	err := c.call(ctx, http.MethodGet, "/v1/status", nil, &st)
	return st, err
}

// Healthy returns nil when the agent serves.
func (c *Client) Healthy(ctx context.Context) error {
	var ok map[string]string
	return c.call(ctx, http.MethodGet, "/healthz", nil, &ok)
}

// Watch calls see with each status the agent sends until the half has ended, and
// returns the last one. A broken connection is an error: the migration goes on
// without its watcher.
func (c *Client) Watch(ctx context.Context, id string, see func(Status)) (Status, error) {
	resp, err := c.send(ctx, http.MethodGet, "/v1/migrations/"+id+"/watch", nil)
	if err != nil {
		return Status{}, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 64<<10), maxStatusLine)
	var last Status
	for lines.Scan() {
		last = Status{}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			return last, fmt.Errorf("reading a status of migration %s: %w", id, err)
		}
		if see != nil {
			see(last)
		}
		if last.State != StateRunning {
			return last, nil
		}
	}
	return last, fmt.Errorf("agent at %s stopped telling of migration %s: %w",
		c.path, id, cmpErr(lines.Err(), io.ErrUnexpectedEOF))
}

func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

func (c *Client) call(ctx context.Context, method, path string, body io.Reader, into any) error {
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxStatusLine))
	if err != nil {
		return fmt.Errorf("reading the agent's answer: %w", err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("reading the agent's answer: %w", err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the agent at %s (is it running?): %w", c.path, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var p problem
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxRequest))
	if err != nil || json.Unmarshal(data, &p) != nil || p.Error == "" {
		return nil, fmt.Errorf("the agent at %s answered %s", c.path, resp.Status)
	}
	return nil, errors.New(p.Error)
}
