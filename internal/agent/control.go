// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"time"
)

// maxRequest bounds the body of a control request, in bytes.
const maxRequest = 1 << 20

// watchEvery is how often a watcher is told how a migration stands.
const watchEvery = 200 * time.Millisecond

// ServeControl answers control requests on a unix socket at path until ctx ends.
// Only the agent's own user may connect: the socket is made with mode 0600. What
// a crashed agent left at path is replaced; a socket that another agent still
// serves is an error.
func (a *Agent) ServeControl(ctx context.Context, path string) error {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return fmt.Errorf("control socket %s is served by another agent: stop it or choose another path", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing a stale control socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("listening on the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return fmt.Errorf("closing the control socket to other users: %w", err)
	}
	srv := &http.Server{
		Handler:           a.routes(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// Watchers see ctx end by themselves; one second is for the others.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err = srv.Serve(ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (a *Agent) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !a.serving() {
			refuse(w, http.StatusServiceUnavailable, errNotServing)
			return
		}
		reply(w, http.StatusOK, map[string]string{"status": "serving"})
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.Status())
	})
	mux.HandleFunc("POST /v1/migrations", a.handleStart)
	mux.HandleFunc("GET /v1/migrations/{id}", func(w http.ResponseWriter, r *http.Request) {
		if m := a.find(r.PathValue("id")); m != nil {
			reply(w, http.StatusOK, m.status())
			return
		}
		refuse(w, http.StatusNotFound, unknown(r.PathValue("id")))
	})
	mux.HandleFunc("GET /v1/migrations/{id}/watch", a.handleWatch)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("DELETE /v1/migrations/{id}", a.handleCancel)
	return mux
}

func (a *Agent) handleStart(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	var spec Spec
	if err := decodeStrict(body, &spec); err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	m, err := a.Start(r.Context(), spec)
	switch {
	case errors.Is(err, ErrExists):
		refuse(w, http.StatusConflict, err)
	case err != nil:
		refuse(w, http.StatusUnprocessableEntity, err)
	default:
		reply(w, http.StatusCreated, m.status())
	}
}

// handleWatch streams one JSON object a line: now, at every change of state and
// every watchEvery, until the half is over or the watcher leaves.
func (a *Agent) handleWatch(w http.ResponseWriter, r *http.Request) {
	m := a.find(r.PathValue("id"))
	if m == nil {
		refuse(w, http.StatusNotFound, unknown(r.PathValue("id")))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc, flush := json.NewEncoder(w), http.NewResponseController(w)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		st := m.status()
		if enc.Encode(st) != nil || flush.Flush() != nil || st.State != StateRunning {
			return
		}
		select {
		case <-tick.C:
		case <-m.done:
		case <-r.Context().Done():
			return
		}
	}
}

func (a *Agent) handleCancel(w http.ResponseWriter, r *http.Request) {
	m := a.find(r.PathValue("id"))
	if m == nil {
		refuse(w, http.StatusNotFound, unknown(r.PathValue("id")))
		return
	}
	if err := m.requestCancel(); err != nil {
		refuse(w, http.StatusConflict, err)
		return
	}
	reply(w, http.StatusAccepted, m.status())
}

func unknown(id string) error {
	return fmt.Errorf("no migration %q at this agent: it was never started here or was forgotten after it ended", id)
}

func refuse(w http.ResponseWriter, code int, err error) {
	reply(w, code, problem{Error: err.Error()})
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A reader that has gone is no error of ours.
	_ = json.NewEncoder(w).Encode(body)
}
