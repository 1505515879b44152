// Command plain serves govmomi's simulator as it comes, with nothing of the lab's: what our client asks of a vCenter
// must be no more than this gives.
//
// It prints one JSON line (url, host, port, username, password) when ready and runs until SIGTERM or SIGINT.
package main

import (
	"crypto/tls"
	"encoding/json"
	"log"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/vmware/govmomi/simulator"
)

func main() {
	model := simulator.VPX()
	if err := model.Create(); err != nil {
		log.Fatal(err)
	}
	defer model.Remove()
	model.Service.TLS = new(tls.Config)
	model.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword("hyper", "plain")}
	server := model.Service.NewServer()
	defer server.Close()
	port, _ := strconv.Atoi(server.URL.Port())
	ready := map[string]any{
		"url": "https://" + server.URL.Host + "/sdk", "host": "127.0.0.1", "port": port,
		"username": "hyper", "password": "plain",
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		log.Fatal(err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	<-stop
}
